"""gunicorn configuration of the example, as for any guarded application.

    gunicorn -c gunicorn.conf.py "example_app.app:create_app()"

`flask_socketio_guard_gunicorn` explains each setting and lists the environment variables. Override
settings below the import.
"""

from flask_socketio_guard_gunicorn import *  # noqa: F403
