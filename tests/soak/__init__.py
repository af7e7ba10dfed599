"""Real trainings are hurt at random instants, recovered, and must end as the untouched run did."""
