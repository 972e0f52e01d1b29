"""How networks learn: exact dynamics, generalisation, effective theory, parametrisations."""
