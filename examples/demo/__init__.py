"""`make demo`: three regions on this machine; the primary's region dies; nothing is lost."""
