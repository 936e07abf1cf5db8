"""Parts of the push-pull benchmark (see ../README.md); found because pushpull.py stands beside it."""
