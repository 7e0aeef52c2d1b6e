"""Samples written anew in one stored stage, and checked."""
