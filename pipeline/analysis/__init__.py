"""How far compressed gradients are from the true one, and what follows for a schedule."""
