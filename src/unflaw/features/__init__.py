"""Frozen features: backbones, aggregation of their levels, and the cache that training runs on."""
