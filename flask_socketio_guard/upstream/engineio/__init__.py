"""Code that touches private parts of python-engineio: sessions, WebSockets, HTTP."""
