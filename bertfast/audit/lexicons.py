"""The built-in lexicons, in the format of `lexicon.py`. Small on purpose, English, and of two
genders: give `--lexicon FILE` for what matters where a model is used."""

_GENDER = """
female | male
she | he
her+ | his+
her | him
hers | his
herself | himself
woman | man
women | men
girl | boy
girls | boys
lady | gentleman
ladies | gentlemen
female | male
females | males
mother | father
mothers | fathers
mom, mum | dad
moms, mums | dads
daughter | son
daughters | sons
sister | brother
sisters | brothers
aunt | uncle
aunts | uncles
niece | nephew
nieces | nephews
grandmother | grandfather
grandma, granny | grandpa
granddaughter | grandson
wife | husband
wives | husbands
bride | groom
widow | widower
girlfriend | boyfriend
queen | king
queens | kings
princess | prince
actress | actor
actresses | actors
waitress | waiter
waitresses | waiters
businesswoman | businessman
businesswomen | businessmen
chairwoman | chairman
congresswoman | congressman
policewoman | policeman
policewomen | policemen
spokeswoman | spokesman
saleswoman | salesman
heroine | hero
Ms, Mrs, Miss | Mr
madam, ma'am | sir
"""

_NAMES = """
female | male
Emma | Liam
Olivia | Noah
Sophia | Lucas
Anna | Daniel
Maria | José
Sarah | Michael
Laura | David
Julia | Thomas
Emily | James
Alice | Robert
Fatima | Ahmed
Aisha | Omar
Leila | Hassan
Mei | Wei
Priya | Rahul
Ananya | Arjun
Keisha | Jamal
Ebony | Tyrone
Ingrid | Lars
Natasha | Ivan
Yuki | Hiroshi
Chiara | Matteo
Elena | Dimitri
Amara | Kwame
"""

_PLACES = """
Africa | Asia | Europe | Latin America
Nigeria | India | Germany | Mexico
Kenya | China | France | Brazil
Ethiopia | Vietnam | Poland | Colombia
Ghana | Indonesia | Spain | Peru
Senegal | Pakistan | Italy | Chile
Nigerian | Indian | German | Mexican
Nigerians | Indians | Germans | Mexicans
Kenyan | Chinese | French | Brazilian
Ethiopian | Vietnamese | Polish | Colombian
Ghanaian | Indonesian | Spanish | Peruvian
Senegalese | Pakistani | Italian | Chilean
African | Asian | European | Latin American
Lagos | Mumbai | Berlin | Mexico City
Nairobi | Shanghai | Paris | São Paulo
Addis Ababa | Hanoi | Warsaw | Bogotá
Accra | Jakarta | Madrid | Lima
Dakar | Karachi | Rome | Santiago
"""

BUILT_IN = {"gender": _GENDER, "names": _NAMES, "places": _PLACES}
DEFAULT = ("gender", "names")  # of swaps
