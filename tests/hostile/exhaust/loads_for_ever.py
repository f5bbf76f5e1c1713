"""Never finishes loading."""
# ruff: noqa

while True:
    pass
