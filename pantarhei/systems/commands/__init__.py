"""Commands of the systems wing; each module is one."""
