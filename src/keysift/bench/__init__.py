"""Measuring: inputs with the attention shapes of long-context models, what methods cover, how long they take."""
