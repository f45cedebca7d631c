"""The path under which scripts written for smdistributed import the translate functions."""
