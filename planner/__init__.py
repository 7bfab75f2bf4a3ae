"""Floor 3: the search. It decides; it never measures and never emits.

linear_program   integer programs as arrays, solved through OR-tools MathOpt
chain            the distinct blocks of a model and how they follow each other
signatures       signatures over several axes, views
sbp_program      the types inside blocks, as an integer program
costs            what that program pays: the cost model on a mesh
inner, insides   all blocks on one tensor mesh, solved and priced; those that a search needs
alike            sorts of intervals of a chain, of which there are few
stages           cutting the chain of segments into stages
virtual_stages   the same where ranks have several
every_cut        the same exactly, for small chains whose memory binds
stage_problem    another problem of stages, Piper's: graphs of layers, choices for every layer
downsets         what the first stages of a pipeline can have together
stage_intervals  every stage that there could be, with its sums
stage_choices    what a stage's seconds can be traded for
stage_cover      the fewest devices on which stages cover a model
stage_program    the plan of that problem whose slowest stage takes least
candidates       a configuration
space            the configurations to look at
bounds           what no cut of a configuration can beat
solving          one candidate solved: its stages, its step, where it lies
relax            why nothing fits, and what would
search           best first over configurations, with bounds
fewer_nodes      on how many nodes a job spends least
request, fix     what is asked for, what is fixed, pins
allow            changes of the model itself that may be made
model_changes    what these cost and save
sites            the parts of a cluster that pipeline ranks lie on
mapping          which node takes which place of a job
rank_order       which rank of a plan takes which device, for what is there already
traffic          what a configuration sends between nodes
step             the price of a step: stages, schedule, what happens once, memory
predict          the price of a given configuration, without a search
leave_out        whether a job is faster without its slow nodes
holdings         what every rank of a plan keeps from step to step
migration        moving a running job from one plan to another
replan           the best plan after nodes were lost or joined, the way there included
waiting          a new plan beside waiting for the repair
sensitivity      what a step would take if one thing were different
build, report    the plan, and the plan in words
explain          where time and memory go, what binds, what the runners-up lose
"""

from .allow import Allow
from .build import build_plan, check_described
from .candidates import emits, unemittable
from .explain import Explanation
from .fewer_nodes import least_spending
from .fix import Fix
from .leave_out import advice_on
from .predict import Prediction, predict
from .replan import Replanned, replan
from .report import summary, to_json
from .request import Request, check_degrees
from .search import Search
from .stage_problem import StagePlan, StageProblem
from .stage_program import best_stages
from .transfer import scaled_plan

__all__ = [
    "Allow",
    "Explanation",
    "Fix",
    "Prediction",
    "Replanned",
    "Request",
    "Search",
    "StagePlan",
    "StageProblem",
    "advice_on",
    "best_stages",
    "build_plan",
    "check_degrees",
    "check_described",
    "emits",
    "least_spending",
    "predict",
    "replan",
    "scaled_plan",
    "summary",
    "to_json",
    "unemittable",
]
