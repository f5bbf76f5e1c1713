"""Evaluation: responses drawn and scored through the pools, and what is read from them."""
