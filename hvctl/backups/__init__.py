"""Backups of instances: kept in a repository, restored on any host."""
