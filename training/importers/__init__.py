"""Readers of the logs that gateways already keep. `importing.import_log` is the door, `kinds` lists the readers."""
