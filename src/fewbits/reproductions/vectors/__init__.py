"""Headline claims of the room vectors."""
