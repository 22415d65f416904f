"""The tests of Flask-SocketIO-Guard."""
