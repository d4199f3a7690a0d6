"""OpsQL, the bundled task: template.md, the language, generated rows and the score."""
