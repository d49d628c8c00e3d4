"""Runnable headline claims; mirrors the rooms."""
