"""Audits of finished runs as Flower jobs (`job="audit"`), and the short one that the main job ends with."""
