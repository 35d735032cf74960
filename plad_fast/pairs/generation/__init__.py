"""Answers from models: in this process, behind an endpoint, or given."""
