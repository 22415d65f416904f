"""Code that touches private parts of python-socketio: server, managers, packets."""
