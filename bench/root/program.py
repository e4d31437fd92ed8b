# Dictionaries, strings, classes, JSON, generators, sorting, calls: what a Python program is made of.
import collections
import heapq
import json
import re


class Numbers:
    def __init__(self, seed):
        self.seed = seed

    def below(self, bound):
        self.seed = (self.seed * 1103515245 + 12345) % 2147483648
        return (self.seed >> 8) % bound


numbers = Numbers(1)
records = [
    {
        "id": n,
        "name": "".join(chr(97 + numbers.below(26)) for _ in range(8)),
        "tags": [f"t{numbers.below(40)}" for _ in range(3)],
        "weight": numbers.below(1000) / 8,
    }
    for n in range(3000)
]
text = json.dumps(records, indent=1)
read = json.loads(text)
print(len(text), read == records)

count = collections.Counter(tag for record in read for tag in record["tags"])
print(sorted(count.items(), key=lambda item: (-item[1], item[0]))[:5])
by_name = sorted(read, key=lambda record: (record["name"][::-1], record["id"]))
print(by_name[0]["name"], sum(len(found) for found in re.findall(r"[aeiou]+[^aeiou]", text)))

edges = collections.defaultdict(list)
for n in range(12000):
    edges[numbers.below(2000)].append((numbers.below(2000), 1 + numbers.below(90)))


def distances(start):
    best, queue = {start: 0}, [(0, start)]
    while queue:
        far, at = heapq.heappop(queue)
        if far > best[at]:
            continue
        for to, cost in edges[at]:
            if far + cost < best.get(to, 1 << 30):
                best[to] = far + cost
                heapq.heappush(queue, (far + cost, to))
    return best


print(sum(max(distances(start).values()) for start in range(6)))


def queens(size, columns=()):
    if len(columns) == size:
        return 1
    row = len(columns)
    free = lambda c: all(c != o and abs(c - o) != row - r for r, o in enumerate(columns))
    return sum(queens(size, columns + (c,)) for c in range(size) if free(c))


print(queens(6))
