"""The systems wing's commands for people who do not write code; each module is one."""
