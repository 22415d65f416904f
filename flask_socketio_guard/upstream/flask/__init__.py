"""Code that touches private parts of Flask and Flask-SocketIO."""
