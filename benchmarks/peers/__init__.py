"""Peers of the input benchmark, each as its documentation recommends; benchmarks.trial says what a peer offers."""
