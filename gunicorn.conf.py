"""How the processes of the example are deployed: as those of any guarded application.

    gunicorn -c gunicorn.conf.py "example_app.app:create_app()"

`flask_socketio_guard_gunicorn` says what each setting is for, and which variables it reads. What is
to be different goes below the import.
"""

from flask_socketio_guard_gunicorn import *  # noqa: F403
