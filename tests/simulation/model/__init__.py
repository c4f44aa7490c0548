"""The take-over protocol, explored to exhaustion at small bounds (README.md says what that shows)."""
