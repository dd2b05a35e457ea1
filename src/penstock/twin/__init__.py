"""The twin: the decision code of the live system in virtual time, on modelled hardware."""
