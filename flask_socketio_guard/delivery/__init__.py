"""Messages that must arrive: kept until they are acknowledged, at least once."""
