"""The demonstration: the example application, with a panel to break it and a check that does.

``python -m demo`` runs two processes of it and a Redis; ``python -m demo --check`` injects every
fault and prints what became of the events. `demo.app` is the application with the panel.
"""
