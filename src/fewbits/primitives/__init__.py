"""Shared bricks; no paper names in here."""
