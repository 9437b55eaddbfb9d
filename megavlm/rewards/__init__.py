"""How answers are judged: functions, one's own Python files, and the worker processes that run them; without torch."""
