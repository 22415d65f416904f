"""The demo: the example application with a panel of faults, and an automatic check.

``python -m demo`` runs two processes of it and a Redis. ``python -m demo --check`` injects every
fault and prints how many events were lost. `demo.app` is the application with the panel.
"""
