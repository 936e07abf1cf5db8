"""Replicas of several workers: tensor and pipeline parallelism inside a replica."""
