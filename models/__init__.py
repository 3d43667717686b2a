"""Decoder models: one readable decoder, the families it can be, loading and generation."""
