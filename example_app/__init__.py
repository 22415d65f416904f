"""The Harbour Exchange: a small live application, protected by Flask-SocketIO-Guard.

``app.py`` is the application, and the only file to read for how the guard is used.
``python -m example_app.demo`` runs it: two processes, a Redis and a panel to break things with.
"""
