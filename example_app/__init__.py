"""The Harbour Exchange: a small live application, protected by Flask-SocketIO-Guard.

``app.py`` shows how the guard is used; ``pages.py`` and ``market.py`` are what it needs besides.

    gunicorn -c gunicorn.conf.py "example_app.app:create_app()"
"""
