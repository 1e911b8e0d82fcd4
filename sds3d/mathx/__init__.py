"""Pure functions of diffusion mathematics and regularisers; each formula has one home here."""
