"""Models that wait in host memory: their storages are empty meanwhile, and are what they were afterwards."""

import torch

from megavlm.runtime.parking import Parking


def test_whole_storages_move_and_views_stay_what_they_are():
    buffer = torch.arange(6.0)
    parameter = torch.nn.Parameter(buffer[2:4].view(2, 1))  # as Megatron's buffers hold parameters
    gradient = torch.ones(6)
    view, late = gradient[1:3], dict[str, torch.Tensor]()
    parking = Parking(lambda: [buffer, parameter, *late.values()], lambda: [gradient])
    storages = [tensor.untyped_storage() for tensor in (buffer, parameter, gradient)]
    assert [storage.nbytes() for storage in storages] == [0, 0, 0]
    with parking():
        assert torch.equal(parameter.detach().flatten(), torch.tensor([2.0, 3.0]))
        assert not gradient.any()  # its values are not kept
        with parking():
            parameter.data.mul_(10)
            view.fill_(7)
        assert storages[0].nbytes() == 24  # the inner block ends nothing
        late["moment"] = torch.full((3,), 5.0)  # an optimizer makes its state late
    assert [tensor.untyped_storage().nbytes() for tensor in (buffer, gradient, late["moment"])] == [0, 0, 0]
    replaced = late.pop("moment")
    with parking():
        assert torch.equal(buffer, torch.tensor([0.0, 1.0, 20.0, 30.0, 4.0, 5.0]))
        assert torch.equal(replaced, torch.full((3,), 5.0))
        assert not view.any()
    with parking():
        assert torch.equal(
            replaced, torch.full((3,), 5.0)
        )  # nobody names it any more: it does not wait with the others
        assert torch.equal(parameter.detach().flatten(), torch.tensor([20.0, 30.0]))


def test_constant_values_are_copied_once():
    weight = torch.arange(4.0)
    parking = Parking(lambda: [weight], constant=True)
    with parking():
        weight.zero_()
    with parking():
        assert torch.equal(weight, torch.arange(4.0))
