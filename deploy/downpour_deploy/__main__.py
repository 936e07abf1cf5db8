"""``python -m downpour_deploy`` is ``downpour``."""

from downpour_deploy.main import main

main()
