"""What ``SocketIOGuard`` offers: one class for each capability, which only says what it takes.

What a call does, and the checks of its arguments, are in the room that owns the capability.
"""
