"""What a step costs on hardware that need not be there: seconds, joules, and how sure we are.

work.py        StepWork and StepCost, the question and the answer
model.py       CostModel, the protocol that the twin's executor calls
spec.py        ModelSpec and Parallel: the shape of the model, and how it is cut over devices
operators.py   fitted cost of one kernel: matrix product, attention, pointwise, collective
hardware.py    HardwareProfile and EngineProfile, read from profiles/*.toml
roofline.py    RooflineCostModel: operators added up over a model (first principles)
tables.py      FittedCostModel: whole steps, fitted to recorded ones (this machine)
"""
