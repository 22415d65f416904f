"""Telemetry: one record for each event, and its consumers (signals, counters, log, health)."""
