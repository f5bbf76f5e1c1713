"""Servers of autoregressive models: started beside a run or found by their URL, and the client that asks them."""
