"""The Harbour Exchange: a small live application, protected by Flask-SocketIO-Guard.

``app.py`` shows how to use the guard; ``pages.py`` and ``market.py`` contain the rest.

    gunicorn -c gunicorn.conf.py "example_app.app:create_app()"
"""
