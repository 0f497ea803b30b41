"""Products of two numbers of n digits each, written out: 67*54=3618.

The digits of the product and the end after it are scored. Difficulty is the number of carries in
long multiplication that are not 0. A product in the other order is the same instance.
"""

from __future__ import annotations

from ebwm_scale.data.prepare.reasoning.instance import Draws, Family, Instance


def draw(draws: Draws, size: int) -> Instance:
    """size: digits."""
    low, high = 10 ** (size - 1), 10**size - 1
    a, b = draws.between(low, high), draws.between(low, high)
    product = str(a * b)
    return Instance(
        puzzle=f"{a}*{b}=",
        solution=product,
        scored="1" * (len(product) + 1),
        difficulty=carries(a, b),
        identity=f"{min(a, b)}*{max(a, b)}",
    )


def carries(a: int, b: int) -> int:
    """Carries other than 0: in each row a times a digit of b, and in the sum of the rows."""
    total, count = 0, 0
    for place, digit in enumerate(reversed(str(b))):
        carry = 0
        for other in reversed(str(a)):
            carry = (int(other) * int(digit) + carry) // 10
            count += carry > 0
        row = a * int(digit) * 10**place
        count += _carries_of_sum(total, row)
        total += row
    return count


def _carries_of_sum(a: int, b: int) -> int:
    carry, count = 0, 0
    while a or b:
        carry = (a % 10 + b % 10 + carry) // 10
        count += carry
        a, b = a // 10, b // 10
    return count


FAMILY = Family(
    name="multiplication",
    symbols="0123456789*=",
    sizes=range(1, 13),
    size_word="digits",
    draw=draw,
    longest=lambda size: 4 * size + 2,
)
