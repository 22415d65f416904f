"""Real faults on real servers, brokers and clients.

Each test holds a row of the table of faults. With ``pytest --stock`` the same tests run without
the guard, and each is expected to fail for the reason it names.
"""
