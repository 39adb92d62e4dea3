"""NPO's synthetic experiment (2404.05868)."""
