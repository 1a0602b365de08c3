"""The FastAPI service that answers routing decisions to a gateway."""
