"""A framework that neutral does not know, added by a package of somebody else. Its files are JSON."""
