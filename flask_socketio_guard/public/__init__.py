"""The public API of ``SocketIOGuard``: one class of methods for each capability.

These methods only define signatures; the package that owns a capability checks the arguments and
does the work.
"""
