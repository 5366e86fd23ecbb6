"""Graph passes over torch.fx that make a model elastic and turn a profile back into a plain graph."""
